"""The dense way: three models in memory, subtract, add, save."""

import sys

import torch
from transformers import AutoModelForCausalLM

base, plus, minus = (AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16) for name in sys.argv[1:4])
positive, negative = plus.state_dict(), minus.state_dict()
w = {name: positive[name].float() - negative[name].float() for name in positive}
with torch.no_grad():
    for name, parameter in base.state_dict().items():
        parameter.copy_(parameter.float() + w[name])
base.save_pretrained(sys.argv[4], max_shard_size="500MB")
