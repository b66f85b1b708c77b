"""Runs Python programs that nobody trusts: under limits, apart from the machine, many at once.

The pieces, from the caller inwards. Only `client` is for others.

    client.py    in bmjax: starts the server, hands it jobs, waits for outcomes
    server.py    a process of its own: forks a supervisor for a job, which limits and kills what the job starts
    isolate.py   namespaces, users and capabilities: what the kernel offers to keep a program apart
    program.py   the process of the program: its limits, its streams, and running it as a user would

A program is forked from the server, which has started Python once and imported what programs usually import. So a run
costs milliseconds. All but `client` use the standard library alone.
"""
