"""Every option of the trainer, a file a group. No torch: launchers read them as well.

Beside a field stand its default, its bounds, whether it is free on a resume, and its help. A group's own refusals are
its method `refuse`. config.py has the groups together, stored.py a configuration as JSON, trainer/check.py the rules
across groups.
"""
