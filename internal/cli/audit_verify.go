package cli

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
)

func newAudit() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "audit COMMAND",
		Short: "work with audit logs",
		Args:  cobra.NoArgs,
		RunE:  needsCommand,
	}
	cmd.AddCommand(newAuditVerify())
	return cmd
}

func newAuditVerify() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify FILE...",
		Short: "find what was altered in an audit log",
		Long: `verify checks the chain of an audit log and names each line that was altered, inserted, repeated or moved, and where lines are missing. The files of
one log may be given in any order, as audit.jsonl* for example: they are put in the order of their first records.

A log of which the end was removed is a shorter log, and a log without a key can be written anew by whoever may write it. verify prints the last hash: keep it
elsewhere, and a later check with --expect-last finds whether the log still holds that record. Records may follow it.

A line that a crash has cut short is not tampering. It is a finding for as long as nothing follows, and a note once the log has gone on and says so.`,
		Args: cobra.MinimumNArgs(1),
	}
	keyFile := cmd.Flags().String("key-file", "", "`FILE` with the key of the chain (audit.keyFile)")
	expect := cmd.Flags().String("expect-last", "", "`HASH` that a record must have: the last one of an earlier check")
	out := outputFlag(cmd)
	cmd.RunE = fails(func(cmd *cobra.Command, args []string) error {
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
			return &failure{code: exitUsage, err: err, hint: "give the key with --key-file"}
		case errors.Is(err, auditlog.ErrExpected):
			return &failure{code: exitUsage, err: err, hint: "copy it from an earlier check"}
		case err != nil:
			return err
		}
		err = out.write(cmd.OutOrStdout(), r, func(w io.Writer) { printAuditReport(w, r) })
		if err == nil && !r.OK {
			return &failure{code: exitFindings}
		}
		return err
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
			printf(w, "  %s%s: %s\n", where, f.Kind, f.Text)
		}
	}
	if r.OK {
		printf(w, "ok\n")
	} else {
		printf(w, "%d finding(s)\n", len(r.Findings)+r.More)
	}
	lines(r.Findings)
	if r.More > 0 {
		printf(w, "  and %d more\n", r.More)
	}
	if len(r.Notes) > 0 {
		printf(w, "notes\n")
		lines(r.Notes)
	}
	chain := "without a key: whoever may write it can write it anew"
	if r.Keyed {
		chain = "keyed"
	}
	printf(w, "records    %d, from %d to %d, in %d file(s)\n", r.Records, r.FirstSeq, r.LastSeq, len(r.Files))
	printf(w, "chain      %s\n", chain)
	if r.Since != nil {
		printf(w, "expected   there, with %d record(s) after it\n", *r.Since)
	}
	if r.Lost > 0 {
		printf(w, "lost       %d record(s) could not be written\n", r.Lost)
	}
	printf(w, "last hash  %s\n", r.LastHash)
}
