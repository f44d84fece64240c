"""The tasks by name."""

from benchmarks.quality.task import Task
from benchmarks.quality.tasks.captions import CAPTIONS
from benchmarks.quality.tasks.grounding import GROUNDING
from benchmarks.quality.tasks.mmbench import MMBENCH
from benchmarks.quality.tasks.mme import MME
from benchmarks.quality.tasks.multiple_choice import MULTIPLE_CHOICE
from benchmarks.quality.tasks.perplexity import PERPLEXITY
from benchmarks.quality.tasks.synthetic import SYNTHETIC
from benchmarks.quality.tasks.touchstone import TOUCHSTONE
from benchmarks.quality.tasks.vqa import VQA

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
