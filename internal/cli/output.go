package cli

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"
)

// output is the value of --output.
type output string

// outputFlag adds --output. Cobra refuses other values than text and json.
func outputFlag(cmd *cobra.Command) *output {
	o := output("text")
	cmd.Flags().VarP(&o, "output", "o", "form of the report")
	_ = cmd.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]cobra.Completion{"text", "json"}, cobra.ShellCompDirectiveNoFileComp))
	return &o
}

// String, Set and Type implement pflag.Value.
func (o *output) String() string { return string(*o) }

// Set implements pflag.Value.
func (o *output) Set(s string) error {
	if s != "text" && s != "json" {
		return fmt.Errorf("write text or json")
	}
	*o = output(s)
	return nil
}

// Type implements pflag.Value.
func (*output) Type() string { return "text|json" }

// write prints report as JSON, or calls text.
func (o *output) write(w io.Writer, report any, text func(io.Writer)) error {
	if *o == "text" {
		// In one piece, so that a report which could not be written is an error, and not a success that nobody can read.
		var report bytes.Buffer
		text(&report)
		_, err := w.Write(report.Bytes())
		return err
	}
	e := json.NewEncoder(jsonText{w})
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(report)
}
