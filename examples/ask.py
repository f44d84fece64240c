"""Ask about an image from Python: python examples/ask.py [BUNDLE] [IMAGE]

BUNDLE is a bundle, a checkpoint or OWNER/NAME on a hub (default: the small model that ships); the default image is a
synthetic scene. The image with the answer's boxes is written to boxes.png.
"""

import sys

from qvl_edge import Runtime
from qvl_edge.demo import SMALL_MODEL
from qvl_edge.demo.scenes import UNSEEN, make_scene


def main(path: str = str(SMALL_MODEL), image: str | None = None) -> None:
    """Two turns about one image; the second is streamed."""
    picture = make_scene(UNSEEN).image if image is None else image
    runtime = Runtime.from_pretrained(path)

    query = [{"image": picture}, {"text": "Describe the picture with boxes."}]
    answer = runtime.answer(query, do_sample=False)
    print(answer.text)
    for box in answer.boxes:
        print(box.label, box.pixels)

    history = [(query, answer.text)]
    for piece in runtime.answer_stream("How many shapes are there?", history, do_sample=False):
        print(piece if isinstance(piece, str) else f"\n{piece.usage}", end="", flush=True)
    print()

    if (drawn := runtime.draw_bbox_on_latest_picture(answer.text, history)) is not None:
        drawn.save("boxes.png")


if __name__ == "__main__":
    main(*sys.argv[1:])
