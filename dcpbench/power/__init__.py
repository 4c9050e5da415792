"""How well the suites find: they run on a bank of wrong backends, to be caught, and of odd ones, which are right.

bank.py     suite_tests.py     hunt.py                      rows.py             page.py
entries --> tests, in rounds -> caught, shrunk or not -->  a row per backend -> table, Markdown, Parquet
"""
