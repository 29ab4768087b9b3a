"""What travels to the Hub beside a checkpoint: configuration, model, exits, policies, losses, engine and pipeline."""
