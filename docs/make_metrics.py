"""Write docs/metrics.md from the table of metrics in the code.

python docs/make_metrics.py
"""

from pathlib import Path

from igpo_trl.training.metric_table import METRICS, table

HEADER = """# Metrics

This page helps you read the logs of a training run: what each metric means, which values are healthy, and what to do
when they are not. `python docs/make_metrics.py` makes this page from the table in the code.

## Where they are

`igpo train` and `train.py` print one line per log, with the figures that matter most:

```text
step 12/200  reward 0.216  searches 1.6  belief 0.085 → 0.28  collapse 50%  answered 88%  tokens/s 68  left 7:51:20
```

`searches` are tool calls per rollout, `belief` is the mean belief before the first and before the last turn,
`collapse` the share of groups whose outcomes are all equal, `answered` the share of rollouts that ended with an
answer. An evaluation's line begins with its F1 and exact match. On a terminal, a progress bar stands below the lines;
in a log file there are only the lines.

Every metric goes to the trackers that `report_to` names (`tensorboard`, `trackio`, `wandb`), and to `metrics.jsonl`
in the output directory: a JSON object per log, with its `step`. Training that resumes removes what belongs to later
steps; a new run in the same directory moves the file of the earlier one to `metrics-1.jsonl`.

```python
import pandas as pd

metrics = pd.read_json("outputs/run/metrics.jsonl", lines=True).set_index("step")
print(metrics[["reward", "belief/final"]].dropna())
```

In Python, both are callbacks. `StepLines` takes the place of what transformers prints, in scripts and in notebooks:

```python
from igpo_trl import IGPOConfig, IGPOTrainer
from igpo_trl.data import load_questions
from igpo_trl.search import BM25Index, SearchTool
from igpo_trl.training.console import MetricsFile, StepLines

trainer = IGPOTrainer(
    model="Qwen/Qwen2.5-3B-Instruct",
    args=IGPOConfig(output_dir="outputs/run", num_generations=8, gradient_accumulation_steps=16, logging_steps=1),
    train_dataset=load_questions("questions.jsonl.gz"),
    tools=[SearchTool(BM25Index.build("corpus.jsonl.gz"))],
)
trainer.add_callback(MetricsFile())
trainer.add_callback(StepLines(trainer))
```

With `log_completions=True`, a table shows a few rollouts of the latest batch, from the best to the worst, on one line
each (`num_completions_to_print` says how many, 4 by default). `output_dir/completions/` has all of them in full, as
parquet files, with three columns more than TRL's: the belief before each turn, and the gain and the advantage of each
turn. There, all messages have the same keys, and the arguments of a tool call are the text of a JSON object, because
parquet files and W&B need one type for each column. With `save_trajectories=True`, every training rollout is written
to `output_dir/trajectories/` as JSON Lines; `igpo view RUN --html page.html` makes [a page](view.md) of them, and
[`igpo plot`](evaluation.md#plots) draws curves.

## How they are computed

Each metric covers the whole batch, over all processes; those of `perf/` are of the main process, in training only. A
log that covers several batches, as every evaluation does, has means over their rollouts, whatever the sizes of the
batches are; a rate is weighted by its own denominator, such as the number of calls, and a smallest or largest value
stays one. Questions that a sampler repeats, so that the last batch has the same size on all processes, do not count
in scores, rewards, turns, stops, beliefs and gains.

In evaluation, names begin with `eval_`; with a dict of data sets, every metric is `eval_<set>_…`, and `eval_…` is the
mean over the sets. Evaluation logs rewards, rollouts and tools as training does, and with `belief_at_eval=True` gains
and beliefs too. What a reward function logs with `log_metric` has the name that it gives.
"""


def render() -> str:
    """The page's text."""
    return HEADER + "".join(f"\n## {title}\n\n{table(metrics)}" for title, metrics in METRICS.items())


if __name__ == "__main__":
    Path(__file__).with_name("metrics.md").write_text(render(), encoding="utf-8")
