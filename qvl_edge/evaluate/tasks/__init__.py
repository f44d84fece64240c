"""The tasks by name."""

from qvl_edge.evaluate.task import Task
from qvl_edge.evaluate.tasks.captions import CAPTIONS
from qvl_edge.evaluate.tasks.grounding import GROUNDING
from qvl_edge.evaluate.tasks.mmbench import MMBENCH
from qvl_edge.evaluate.tasks.mme import MME
from qvl_edge.evaluate.tasks.multiple_choice import MULTIPLE_CHOICE
from qvl_edge.evaluate.tasks.perplexity import PERPLEXITY
from qvl_edge.evaluate.tasks.synthetic import SYNTHETIC
from qvl_edge.evaluate.tasks.touchstone import TOUCHSTONE
from qvl_edge.evaluate.tasks.vqa import VQA

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        *CAPTIONS,
        *VQA,
        *MULTIPLE_CHOICE,
        MMBENCH,
        *GROUNDING,
        MME,
        TOUCHSTONE,
        SYNTHETIC,
        PERPLEXITY,
    )
}
