"""``accelerate launch``, as a stage starts it: ``python -m align.runner.launcher WORDS…``. It ends with the stage's
process, and those that it started end with it.
"""

from align.runner.launch import end_with_parent

if __name__ == "__main__":
    end_with_parent()

    from accelerate.commands.launch import main

    main()
