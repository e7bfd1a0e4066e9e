"""What users see of a run.

``answers``       what each command prints
``tables/``       tables and lines for a terminal, and the rows that the page shares with them
``figures``       figures as pure functions of data, and their SVG
``marks``         the points that figures mark
``page``          the self-contained page of a run, and its figures as files
``page.html.j2``  the template of the page
"""
