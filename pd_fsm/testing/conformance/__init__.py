"""The conformance kit: what every transport must do, as tests that anybody can run on their own.

    python -m pytest --pyargs pd_fsm.testing.conformance --pd-fsm-transport=my_package.carrier:create

The suite has four parts: the planes alone, without a session (`test_planes.py`); pairs of real sessions above them
(`test_sessions.py`); the same with faults in between (`test_faults.py`); and the two roles in processes of their own, which are
killed and restarted (`test_processes.py`). docs/conformance.md says how to use it; docs/transports.md is the contract it checks.

The test modules and the plugin need pytest; nothing else in here does. The kit never looks inside a transport: it calls what the
contract names, and watches the memory and the events.
"""
