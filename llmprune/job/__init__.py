"""One pruning job, stage by stage (see :mod:`llmprune.job.job`)."""

from llmprune.job.job import Job as Job
