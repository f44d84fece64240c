"""Makes the int4 decoder of a bundle: GPTQ (arXiv:2210.17323) over Qwen-VL's blocks, one block in memory at a time."""
