"""Score files with a reward model: the same rows come out with rewards, in the same order.

Start at `bulk_job.score_files`. A job is cut into shards of rows, resumes exactly after a kill, and can be
split over processes and machines. Nothing here computes a metric.
"""
