"""From a file to rows: reading files, the catalog of formats, one kind of row from another, the account of every row.

`align.data` is the door; what is in here stands behind it.
"""
