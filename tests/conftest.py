"""For all tests: what they start must not inherit how they themselves were started."""

import signal

# A shell starts background jobs with SIGINT ignored, and nohup ignores SIGHUP; both pass to every child, and the
# supervisor honours them. A handler of our own is what the children see as the default.
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
