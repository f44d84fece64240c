"""Score answers on published evaluations, and measure what quantizing a model cost:

    qvl-edge evaluate BUNDLE --against CHECKPOINT --task textvqa --data textvqa_val.jsonl --images DIR

Both models answer the same items, one in memory at a time. Predictions are saved as they come: interrupted, the same
command resumes and ends in the same report. docs/quality.md describes the tasks and their files:

    nocaps flickr30k | vqav2 okvqa textvqa vizwiz gqa ocrvqa docvqa infographicvqa chartqa_human chartqa_augmented ai2d
    scienceqa seed_bench mmbench | refcoco refcoco+ refcocog grit | mme | touchstone | synthetic | perplexity
"""

import argparse
from pathlib import Path

from qvl_edge.commands.loading import say
from qvl_edge.options import LoadOptions

# load options of the model, not of the one compared with
OWN = ("dtype", "profile", "kv_cache", "head", "activations", "revision")

EXAMPLES = """examples:
  qvl-edge evaluate BUNDLE --task synthetic
  qvl-edge evaluate BUNDLE --against Qwen-VL-Chat --task perplexity --data conversations.json"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `qvl-edge evaluate`."""
    parser.add_argument("path", metavar="MODEL", help="a bundle, a checkpoint, or OWNER/NAME on a hub")
    parser.add_argument("--against", metavar="MODEL", help="another one to compare with: the float checkpoint, say")
    parser.add_argument("--task", required=True, metavar="NAME", help="one of those above")
    parser.add_argument("--data", type=Path, metavar="FILE", help="the task's file, as published")
    parser.add_argument("--images", type=Path, metavar="DIR", help="where its images are (default: beside the file)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N items")
    parser.add_argument(
        "--out", type=Path, default=Path("quality"), metavar="DIR", help="predictions and reports (default: quality)"
    )
    parser.add_argument("--language", choices=("en", "zh"), default="en", help="of the report (default: en)")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="items answered at once (default: 4)")
    parser.add_argument(
        "--seqlen", type=int, default=1024, metavar="N", help="tokens per passage of perplexity (default: 1024)"
    )
    parser.add_argument(
        "--scenes", type=int, default=20, metavar="N", help="scenes drawn for synthetic without --data (default: 20)"
    )
    group = parser.add_argument_group(
        "loading",
        "of both models, but for --dtype, --profile, --kv-cache, --head, --activations and --revision, which are of "
        "the first alone, and --lora, which is of the first, or where that is quantized of the one that it is compared "
        "with. Not given, --max-context is 1024 and --profile 12g, so that a result does not depend on free memory.",
    )
    LoadOptions.add_arguments(group, leave_out=("release_vision", "lookup", "chat_format"))


def execute(args: argparse.Namespace) -> int:
    """Read the data, answer, print the table and write the report."""
    from qvl_edge.errors import EngineError, QvlError
    from qvl_edge.evaluate import TASKS
    from qvl_edge.evaluate.evaluation import Model, evaluate, open_data
    from qvl_edge.evaluate.synthetic import FILE, SYNTHETIC, write_scenes
    from qvl_edge.evaluate.task import QualityDataError

    if args.task not in TASKS:
        raise QualityDataError(f"--task {args.task} does not exist; the tasks are {', '.join(sorted(TASKS))}")
    task, data = TASKS[args.task], args.data
    options = {**LoadOptions.given(args), "slots": args.batch}
    try:
        lora = options.pop("lora", None)
        models = [Model.find(args.path, options, say=say)]
        if args.against:
            shared = {name: value for name, value in options.items() if name not in OWN}
            models.append(Model.find(args.against, shared, beside=models[0].name, say=say))
        if lora is not None:
            owner = 1 if args.against and models[0].is_quantized else 0  # which had it merged before it was quantized
            models[owner] = models[owner].with_lora(lora)
        if data is None and task is SYNTHETIC:
            data = args.out / f"scenes-{args.scenes}" / FILE
            if not data.exists():
                write_scenes(data.parent, args.scenes)
        if data is None:
            raise QualityDataError(f"--task {task.name} needs --data FILE; docs/quality.md has its format")
        opened = open_data(task, data, args.images, limit=args.limit, model=models[0], seqlen=args.seqlen, say=say)
        evaluate(task, opened, models, args.out, language=args.language, say=say)
    except QvlError:
        raise
    except (OSError, EngineError) as error:
        raise QvlError(str(error)) from None
    except KeyboardInterrupt:
        say(f"\nresults so far are kept in {args.out}; the same command resumes")
        raise
    return 0
