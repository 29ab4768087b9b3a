"""What one pass over the data tells: the score of every exit, the score and speed-up of every policy, and its risk."""

from .certificate import RISKS, ExitCertificate, certify, observed_risk, rows_needed
from .choice import OperatingPoint, calibrate, choose, replay, sweep
from .metrics import ExitMetrics, warn_of_one_class
from .scores import Score, accuracy, exit_mean, one_class_exits, overthinking, score_exits
from .speed import flops_speed_up, image_flops, image_flops_speed_up, latency_speed_up, layer_speed_up


__all__ = [
    "RISKS",
    "ExitCertificate",
    "ExitMetrics",
    "OperatingPoint",
    "Score",
    "accuracy",
    "calibrate",
    "certify",
    "choose",
    "exit_mean",
    "flops_speed_up",
    "image_flops",
    "image_flops_speed_up",
    "latency_speed_up",
    "layer_speed_up",
    "observed_risk",
    "one_class_exits",
    "overthinking",
    "replay",
    "rows_needed",
    "score_exits",
    "sweep",
    "warn_of_one_class",
]
