"""Offline work: data, training, distillation, ONNX export and verification."""
