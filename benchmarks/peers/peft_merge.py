"""PEFT's way: both adapters over the loaded model, add_weighted_adapter("cat"), merge_and_unload, save."""

import sys

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

base, plus, minus, out = sys.argv[1:]
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), plus, "plus")
model.load_adapter(minus, "minus")
model.add_weighted_adapter(["plus", "minus"], [1.0, -1.0], "w", combination_type="cat")
model.set_adapter("w")
model.merge_and_unload().save_pretrained(out, max_shard_size="500MB")
