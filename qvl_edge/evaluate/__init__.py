"""Published evaluations, perplexity and a synthetic suite, for one model or against another: `qvl-edge evaluate`."""

from qvl_edge.evaluate.captions import CAPTIONS
from qvl_edge.evaluate.choice import CHOICE
from qvl_edge.evaluate.grounding import GROUNDING
from qvl_edge.evaluate.mme import MME
from qvl_edge.evaluate.perplexity import PERPLEXITY
from qvl_edge.evaluate.synthetic import SYNTHETIC
from qvl_edge.evaluate.task import Task
from qvl_edge.evaluate.touchstone import TOUCHSTONE
from qvl_edge.evaluate.vqa import VQA

TASKS: dict[str, Task] = {
    task.name: task for task in (*CAPTIONS, *VQA, *CHOICE, *GROUNDING, MME, TOUCHSTONE, SYNTHETIC, PERPLEXITY)
}
