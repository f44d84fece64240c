"""An OpenAI-compatible server over one Runtime, with a guard before it and one web page. `qvl-edge serve` starts it."""
