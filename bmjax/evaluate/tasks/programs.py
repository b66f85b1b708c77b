"""Programs, judged by running them against tests: `run_programs: true` is needed."""

from bmjax.evaluate.tasks.task import Task, register

register(Task("humaneval", "164 Python functions to complete", "humaneval", "tests"))
register(Task("mbpp", "500 short Python functions, with their tests shown", "mbpp", "tests"))
register(
    Task(
        "livecodebench",
        "LiveCodeBench, contests from August 2024 to January 2025, avg@4",
        "livecodebench",
        "tests",
        samples=4,
        between={"contest_date": ("2024-08-01", "2025-02-01")},
        lcb_compat=True,
        copy="a release is several large files, which the hub gives one by one; fetch those of "
        "livecodebench/code_generation_lite (release_v5: test.jsonl, test2.jsonl to test5.jsonl), and give their "
        "folder and `release: release_v5`, or the files",
    )
)
