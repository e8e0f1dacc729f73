package harness

// Spawn starts etcd-kms-proxy with args, as [Env.Run] does, and does not wait for its end. Its output is the process' log; a further one of the same name adds to
// it. What still runs at the end of the test is killed.
func (e *Env) Spawn(name string, args ...string) *Process {
	e.TB.Helper()
	return e.StartTool(name, "etcd-kms-proxy", args...)
}

// StartTool is Spawn for another program of the folder of binaries, as etcd-3.7.
func (e *Env) StartTool(name, tool string, args ...string) *Process {
	e.TB.Helper()
	p := e.spawn(name, Bin(e.TB, tool), args...)
	e.TB.Cleanup(func() {
		if p.Alive() == nil {
			p.Kill()
		}
	})
	return p
}
