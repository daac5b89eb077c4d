"""MAX78000 and MAX78002: checkpoints of ai8x-training quantized as ai8x-synthesis' ``quantize.py`` does, and read back.

Nothing here imports more than torch and PyYAML: the command is short and starts often.
"""
