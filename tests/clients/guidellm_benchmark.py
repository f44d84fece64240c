"""guidellm: eight requests, all of them answered."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from scenario import MODEL, URL, passed, using

using("guidellm")
with tempfile.TemporaryDirectory() as name:
    prompts, report = Path(name) / "prompts.jsonl", Path(name) / "report.json"
    prompts.write_text("".join(json.dumps({"prompt": f"Find shape {index}."}) + "\n" for index in range(8)))
    command = [str(Path(sys.executable).with_name("guidellm")), "run"]
    command += ["--backend", f"kind=openai_http,target={URL.removesuffix('/v1')},model={MODEL}"]
    command += ["--profile", "kind=concurrent,streams=2", "--constraint", "kind=max_requests,count=8"]
    command += ["--data", f"kind=json_file,path={prompts}", "--output", f"kind=json,path={report}", "--disable-console"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    totals = json.loads(report.read_text())["benchmarks"][0]["metrics"]["request_totals"]
assert totals == {"successful": 8, "errored": 0, "incomplete": 0, "total": 8}, totals
passed("8 of 8 requests")
