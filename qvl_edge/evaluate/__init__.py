"""Is the int4 model as good? The evaluations that Qwen-VL's README names, over data the user has."""
