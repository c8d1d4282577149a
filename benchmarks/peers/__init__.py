"""The systems that onnxpress is measured beside; each module runs in its own environment."""
