"""What the files of an adapter's folder are called; torch is not needed to know it."""

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
DENSE_FILE = "delta.safetensors"  # ours: what no adapter can hold
