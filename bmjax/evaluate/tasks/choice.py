"""Questions with options, answered by a letter."""

from bmjax.evaluate.tasks.task import Task, register

register(
    Task(
        "gpqa_diamond",
        "198 questions of graduate science, the options in another order in every sample, avg@4",
        "gpqa",
        "choice",
        samples=4,
        shuffle_options=True,
        copy="its authors ask that the questions are not posted, so they are never fetched unasked; give your copy: "
        "gpqa_diamond.csv with the columns Question, Correct Answer, Incorrect Answer 1, 2 and 3, or the hub data set "
        "Idavidrein/gpqa:gpqa_diamond once you may read it",
    )
)
register(Task("arc_challenge", "ARC's challenge set, 1,172 test questions", "arc", "choice"))
register(Task("mmlu", "57 subjects, 14,042 test questions of four options", "mmlu", "choice"))
register(Task("mmlu_pro", "MMLU-Pro, 12,032 test questions of up to ten options", "mmlu_pro", "choice"))
