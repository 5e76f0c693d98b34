"""Post-training quantization of timm Vision Transformers."""
