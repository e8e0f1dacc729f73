package cli

import (
	"strings"

	"github.com/spf13/cobra"
)

// The exit codes, as --help lists them.
const (
	exitFindings = 1 // a check found something
	exitUsage    = 2 // the command line is wrong
	exitFailure  = 3 // the command could not do its work
)

// findings says what exit code 1 of a command means, by the command's path. The others never exit
// with it.
var findings = map[string]string{
	"":                        "a check found something",
	" config check":           "the file has a problem; a warning is none",
	" config from-kubernetes": "the configuration was written, and has a placeholder that must be filled in",
	" status":                 "a value is not current (see reencrypt), a KMS does not answer, or a proxy has other rules",
	" reencrypt":              "a value could not be rewritten",
	" purge":                  "something is left for the operator to do",
	" verify":                 "a value can be read without the KMS",
	" decrypt":                "one of several values could not be decrypted",
	" kms check":              "a KMS cannot do what the rules need of it; with --strict, also if there is a warning",
	" audit verify":           "the log was altered, or is incomplete",
	" kubeadm status":         "the node is not as it should be",
}

// documentExitCodes adds the exit codes to the help of cmd and of all commands below it.
func documentExitCodes(cmd *cobra.Command) {
	var b strings.Builder
	b.WriteString("\n\nExit codes:\n  0  all is well\n")
	if text, ok := findings[strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name())]; ok {
		b.WriteString("  1  " + text + "\n")
	}
	b.WriteString("  2  the command line is wrong\n  3  the command could not do its work")
	if cmd.Long == "" {
		cmd.Long = cmd.Short
	}
	cmd.Long = strings.TrimRight(cmd.Long, "\n") + b.String()
	for _, sub := range cmd.Commands() {
		documentExitCodes(sub)
	}
}
