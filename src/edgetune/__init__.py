"""edgetune: fine-tune a small language model and ship it as int4 ONNX.

The commands are in :mod:`edgetune.cli`, the order of the steps in :mod:`edgetune.workflow`.
"""
