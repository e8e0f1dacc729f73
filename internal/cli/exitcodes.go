package cli

import (
	"strings"

	"github.com/spf13/cobra"
)

// findings says what exit code 1 of a command means, by the path of the command. Other commands
// never exit with it.
var findings = map[string]string{
	"":                        "a check found something",
	" config check":           "the file has a problem",
	" config from-kubernetes": "the configuration was written, and has a placeholder that you must fill in",
	" status":                 "a value is not current (see reencrypt), a KMS does not respond, or a proxy has other rules",
	" reencrypt":              "a value could not be rewritten",
	" purge":                  "something is left for you to do",
	" verify":                 "a value can be read without the KMS",
	" decrypt":                "one of several values could not be decrypted",
	" drill":                  "a value would be missing",
	" kms check":              "a KMS cannot do what the rules need; with --strict, also if there is a warning",
	" audit verify":           "the log was altered, or is incomplete",
	" kubeadm status":         "the node is not set up correctly, or is not ready",
}

// exitCode is a code that a command exits with, and what it means.
type exitCode struct{ code, meaning string }

// exitCodes returns those of a command.
func exitCodes(cmd *cobra.Command) []exitCode {
	codes := []exitCode{{"0", "all is well"}}
	if text, ok := findings[strings.TrimPrefix(cmd.CommandPath(), cmd.Root().Name())]; ok {
		codes = append(codes, exitCode{"1", text})
	}
	return append(codes, exitCode{"2", "the command line is wrong"}, exitCode{"3", "the command failed"})
}

// documentExitCodes adds the exit codes to the help of cmd and of all commands below it.
func documentExitCodes(cmd *cobra.Command) {
	var b strings.Builder
	b.WriteString("\n\nExit codes:")
	for _, c := range exitCodes(cmd) {
		b.WriteString("\n  " + c.code + "  " + c.meaning)
	}
	if cmd.Long == "" {
		cmd.Long = cmd.Short
	}
	cmd.Long = strings.TrimRight(cmd.Long, "\n") + b.String()
	for _, sub := range cmd.Commands() {
		documentExitCodes(sub)
	}
}
