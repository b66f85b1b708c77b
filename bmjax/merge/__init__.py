"""The merge phase: branches become one model. recipe -> plan -> engine -> report, beside methods."""
