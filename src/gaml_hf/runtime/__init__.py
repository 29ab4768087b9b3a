"""Running a trained model: ONNX on a CPU, and whole files of texts."""
