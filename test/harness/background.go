package harness

// Spawn starts etcd-kms-proxy with args, like [Env.Run], and does not wait for its end. Its output
// is the process' log; a second process of the same name appends to it. Processes that still run at
// the end of the test are killed.
func (e *Env) Spawn(name string, args ...string) *Process {
	e.TB.Helper()
	return e.StartTool(name, "etcd-kms-proxy", args...)
}

// StartTool is Spawn for another program in the folder of binaries, such as etcd-3.7.
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
