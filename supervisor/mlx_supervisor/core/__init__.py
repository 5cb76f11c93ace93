"""The supervisor's judgement: pure functions of events. Nothing here can touch a clock, a process or a file."""
