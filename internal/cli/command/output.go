package command

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
)

// Output is the value of --output.
type Output string

// JSON is the form of reports for programs.
const JSON Output = "json"

// OutputFlag adds --output. Cobra refuses values other than text and json.
func OutputFlag(cmd *cobra.Command) *Output {
	o := Output("text")
	cmd.Flags().VarP(&o, "output", "o", "form of the report")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]cobra.Completion{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return &o
}

// String implements pflag.Value.
func (o *Output) String() string { return string(*o) }

// Set implements pflag.Value.
func (o *Output) Set(s string) error {
	if s != "text" && s != "json" {
		return errors.New("write text or json")
	}
	*o = Output(s)
	return nil
}

// Type implements pflag.Value.
func (*Output) Type() string { return "text|json" }

// Write writes report as JSON, or calls text.
func (o Output) Write(w io.Writer, report any, text func(io.Writer)) error {
	if o != JSON {
		// In one write, so that a report that cannot be written is an error.
		var report bytes.Buffer
		text(&report)
		_, err := w.Write(report.Bytes())
		return err
	}
	e := json.NewEncoder(printable.JSON(w))
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(report)
}

// Report writes a report to standard output as Write does. It returns [ErrFindings] unless ok.
func (o Output) Report(cmd *cobra.Command, ok bool, report any, text func(io.Writer)) error {
	if err := o.Write(cmd.OutOrStdout(), report, text); err != nil || ok {
		return err
	}
	return ErrFindings
}
