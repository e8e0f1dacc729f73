package cli

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
)

func newAuditVerify() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify FILE...",
		Short: "find alterations of an audit log",
		Long: `verify checks the chain of an audit log and names each line that was altered, inserted, repeated or
moved, and where lines are missing. The files of one log may be given in any order, for example as
audit.jsonl*: they are sorted by their first records. The commands and the plugins have logs of
their own, such as audit.commands.jsonl: verify each log alone.

Nobody can see that the end of a log was removed, and anyone who may write a log without a key can
rewrite it. verify prints the last hash: keep it elsewhere, and a later check with --expect-last
finds whether the log still has that record. Records may follow it.

A line that a crash has cut short is not tampering. It is a finding while it is the last line, and a
note once the log continues after it.`,
		Args: command.SomeArgs("FILE"),
	}
	keyFile := cmd.Flags().String("key-file", "", "`FILE` with the key of the chain (audit.keyFile)")
	expect := cmd.Flags().String("expect-last", "", "`HASH` of a record that the log must have: the last hash of an earlier check")
	out := command.OutputFlag(cmd)
	cmd.RunE = command.Run(func(cmd *cobra.Command, args []string) error {
		o := auditlog.VerifyOptions{ExpectLast: *expect}
		if *keyFile != "" {
			var err error
			if o.Key, err = auditlog.LoadKey(*keyFile); err != nil {
				return err
			}
		}
		r, err := auditlog.VerifyFiles(o, args...)
		switch {
		case errors.Is(err, auditlog.ErrKeyed):
			return command.Usage("give the key with --key-file", "%w", err)
		case errors.Is(err, auditlog.ErrExpected):
			return command.Usage("copy it from the output of an earlier check", "%w", err)
		case errors.Is(err, auditlog.ErrSeveral):
			return command.Usage("verify each log alone, and name each of its files once", "%w", err)
		case err != nil:
			return err
		}
		return out.Report(cmd, r.OK, r, func(w io.Writer) { printAuditReport(w, r) })
	})
	return cmd
}

func printAuditReport(w io.Writer, r *auditlog.Report) {
	lines := func(fs []auditlog.Finding) {
		for _, f := range fs {
			where := f.File
			if f.Line > 0 {
				where += fmt.Sprintf(":%d", f.Line)
			}
			if where != "" {
				where += ": "
			}
			printable.Fprintf(w, "  %s%s: %s\n", where, f.Kind, f.Text)
		}
	}
	if r.OK {
		printable.Fprintf(w, "ok\n")
	} else {
		printable.Fprintf(w, "%s\n", printable.Count(len(r.Findings)+r.More, "finding", "findings"))
	}
	lines(r.Findings)
	if r.More > 0 {
		printable.Fprintf(w, "  and %d more\n", r.More)
	}
	if len(r.Notes) > 0 {
		printable.Fprintf(w, "notes\n")
		lines(r.Notes)
	}
	chain := "without a key: anyone who may write the log can rewrite it"
	if r.Keyed {
		chain = "keyed"
	}
	printable.Fprintf(w, "records    %d, from %d to %d, in %s\n", r.Records, r.FirstSeq, r.LastSeq, printable.Count(len(r.Files), "file", "files"))
	printable.Fprintf(w, "chain      %s\n", chain)
	if r.Since != nil {
		printable.Fprintf(w, "expected   found, with %s after it\n", printable.Count(*r.Since, "record", "records"))
	}
	if r.Lost > 0 {
		printable.Fprintf(w, "lost       %s could not be written\n", printable.Count(r.Lost, "record", "records"))
	}
	printable.Fprintf(w, "last hash  %s\n", r.LastHash)
}
