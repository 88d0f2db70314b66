"""Methods on pictures: runs, records, scores, tuning, reports and figures."""
