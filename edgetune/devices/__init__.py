"""Where a run is: profiles of boards, phones and computers, and whether this machine is one."""
