"""Attacks on time: code that never ends by itself."""


def spin():
    while True:
        pass


def catch_everything():
    while True:
        try:
            while True:
                pass
        except BaseException:
            continue
