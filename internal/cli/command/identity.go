package command

import (
	"errors"
	"io/fs"
	"os"
	"strings"

	"filippo.io/age/plugin"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/coredump"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/age"
)

// IdentityFlag adds --identity. use says what the command does with it.
func IdentityFlag(cmd *cobra.Command, use string) *[]string {
	return cmd.Flags().StringArray("identity", nil, "age identity `FILE`, "+use+"; it may be protected by a passphrase, or name age plugins; may be repeated")
}

// ReadIdentities reads the files of --identity, and asks for their passphrases on the terminal. It
// returns nil without files. c must have a provider of kind age.
func ReadIdentities(cmd *cobra.Command, c *config.Config, files []string) (*age.Identities, error) {
	if len(files) == 0 {
		return nil, nil
	}
	has := false
	for _, k := range c.KMS {
		has = has || k.Age != nil
	}
	if !has {
		return nil, Usage("add the provider of kind age whose recovery copies the identities decrypt under kms, and name it in recovery of the rules",
			"--identity: the configuration has no provider of kind age")
	}
	if err := coredump.Forbid(); err != nil {
		return nil, problem.New("", "turn off core dumps, which would contain identities: %w", err)
	}
	say := func(format string, args ...any) { printable.Fprintf(cmd.ErrOrStderr(), format+"\n", args...) }
	// The user interface of plugins asks on the terminal, and fails if a plugin asks without one.
	prompt := age.Prompter{Plugin: plugin.NewTerminalUI(say, func(format string, args ...any) { say("warning: "+format, args...) })}
	hint := "name a file that age-keygen -o made, or that of an age plugin"
	if tty := terminal(cmd); tty != nil {
		defer tty.Close()
		prompt.Passphrase = func(file string) ([]byte, error) { return promptPassphrase(cmd, tty, file) }
	} else {
		hint += "; for one with a passphrase, run the command in a terminal"
	}
	var all []*age.Identities
	for _, name := range files {
		ids, err := age.ReadIdentities(name, prompt)
		if errors.Is(err, errInterrupted) {
			return nil, errInterrupted
		}
		if err != nil {
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
				hint = "name a file that exists and that you may read"
			}
			return nil, problem.WithHint(err, hint)
		}
		all = append(all, ids)
	}
	return age.Join(all...), nil
}

// terminal returns the terminal of the command, or nil.
func terminal(cmd *cobra.Command) *os.File {
	if tty, err := os.OpenFile("/dev/tty", os.O_RDWR, 0); err == nil {
		return tty
	}
	if in, ok := cmd.InOrStdin().(*os.File); ok && term.IsTerminal(int(in.Fd())) {
		return in
	}
	return nil
}

// promptPassphrase asks for the passphrase of a file on the terminal, without an echo.
func promptPassphrase(cmd *cobra.Command, tty *os.File, file string) ([]byte, error) {
	question := printable.Sprintf("passphrase of %s: ", printable.Name(file))
	return prompt(cmd, tty, question, func() ([]byte, error) {
		passphrase, err := term.ReadPassword(int(tty.Fd()))
		printable.Fprintf(cmd.ErrOrStderr(), "\n")
		return passphrase, err
	})
}

// WithIdentity adds to the reason of an audit record that private keys were given.
func WithIdentity(reason string, files []string) string {
	if len(files) == 0 {
		return reason
	}
	return strings.TrimPrefix(reason+" with --identity", " ")
}
