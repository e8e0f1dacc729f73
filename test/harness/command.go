package harness

import (
	"context"
	"errors"
	"os/exec"
	"time"
)

// Run runs etcd-kms-proxy with args until it exits, for at most a minute, and returns what it
// printed to both outputs and its exit code. The output is searched for secrets like every log.
func (e *Env) Run(args ...string) (output string, code int) {
	e.TB.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, Bin(e.TB, "etcd-kms-proxy"), args...)
	cmd.SysProcAttr = endWithParent()
	out, err := cmd.CombinedOutput()
	if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited || ctx.Err() != nil {
		e.TB.Fatalf("etcd-kms-proxy %q: %v, %v\n%s", args, err, ctx.Err(), out)
	}
	e.addLog(e.File("run-"+time.Now().Format("150405.000000")+".txt", out))
	return string(out), cmd.ProcessState.ExitCode()
}
