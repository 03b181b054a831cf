"""D2F on open-ended text: a pair trained on the documentation of packages, and its figures.

The word problems of the embedded model leave nothing open but arithmetic. Here almost every token
is a choice, which is hard for parallel acceptance. Run it by python -m d2f_export.open_text.
"""
