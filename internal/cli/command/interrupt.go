package command

import (
	"bufio"
	"context"
	"errors"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/term"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// RunUntilSignal is [Run] for a command that ends when SIGINT or SIGTERM cancels the context of
// cmd. What fails because of that is reported as an interruption.
func RunUntilSignal(f func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return Run(func(cmd *cobra.Command, args []string) error {
		ctx, stop := untilSignal(cmd)
		defer stop()
		cmd.SetContext(ctx)
		err := f(cmd, args)
		if ctx.Err() != nil && (errors.Is(err, context.Canceled) || status.Code(err) == codes.Canceled) {
			return errInterrupted
		}
		return err
	})
}

func untilSignal(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	return signal.NotifyContext(cmd.Context(), os.Interrupt, syscall.SIGTERM)
}

// errInterrupted is the error of a command that a signal ended before it changed anything.
var errInterrupted = errors.New("interrupted")

// Confirm asks for confirmation on the terminal. Without a terminal, --yes is required.
func Confirm(cmd *cobra.Command, yes bool, question string) error {
	if yes {
		return nil
	}
	in, ok := cmd.InOrStdin().(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return Usage("--yes continues without confirmation", "there is no terminal to confirm on")
	}
	input, err := prompt(cmd, in, question+" [y/N] ", func() (string, error) { return bufio.NewReader(in).ReadString('\n') })
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if a := strings.ToLower(strings.TrimSpace(input)); a != "y" && a != "yes" {
		return problem.New("", "not confirmed: nothing was done")
	}
	return nil
}

// prompt prints a question and returns what read reads from the terminal tty. SIGINT and SIGTERM
// end it, although a command may handle them, and although they do not end a read. The terminal is
// then as before: read may have turned its echo off.
func prompt[T any](cmd *cobra.Command, tty *os.File, question string, read func() (T, error)) (T, error) {
	type input struct {
		text T
		err  error
	}
	ctx, stop := untilSignal(cmd)
	defer stop()
	before, unknown := term.GetState(int(tty.Fd()))
	printable.Fprintf(cmd.ErrOrStderr(), "%s", question)
	inputs := make(chan input, 1)
	go func() {
		text, err := read()
		inputs <- input{text, err}
	}()
	select {
	case a := <-inputs:
		return a.text, a.err
	case <-ctx.Done():
		if unknown == nil {
			_ = term.Restore(int(tty.Fd()), before) // the process ends now
		}
		printable.Fprintf(cmd.ErrOrStderr(), "\n")
		var none T
		return none, errInterrupted
	}
}
