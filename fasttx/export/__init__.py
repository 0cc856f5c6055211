"""A finished run as files for other programs: ONNX, torch.export, AOTInductor, Hugging Face.

Each format is written to a temporary folder, read back, compared with the run, and only then kept.
"""
