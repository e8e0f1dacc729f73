package cli

import (
	"os"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestScripts runs the command lines of testdata/script and compares their exit codes and texts.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			// proxy CODE ARGS... runs etcd-kms-proxy and requires the exit code.
			"proxy": func(ts *testscript.TestScript, _ bool, args []string) {
				if len(args) < 1 {
					ts.Fatalf("usage: proxy CODE ARGS...")
				}
				err := ts.Exec("env", append([]string{asCommand + "=1", ts.Getenv("SELF")}, args[1:]...)...)
				code := "0"
				if err != nil {
					code = strings.TrimPrefix(err.Error(), "exit status ")
				}
				if code != args[0] {
					ts.Fatalf("exit code %s, want %s", code, args[0])
				}
			},
		},
		Setup: func(env *testscript.Env) error {
			self, err := os.Executable()
			env.Setenv("SELF", self)
			return err
		},
	})
}
