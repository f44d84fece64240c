"""Commands that turn a checkpoint's vision tower into an ONNX graph."""
