package rpc

import (
	"io"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/gzip" // a client may compress, as with etcd
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
)

// CheckMessage returns the error for the head of a message that is not served: its flag is not that
// of a plain message or, where the client has named a compressor, of a compressed one, or it is too
// long.
func CheckMessage(flag byte, length, limit int, compressor bool) error {
	switch {
	case length > limit:
		return status.Errorf(codes.ResourceExhausted, "grpc: received message larger than max (%d vs. %d)", length, limit)
	case flag > 1:
		return status.Errorf(codes.Internal, "grpc: received unexpected payload format %d", flag)
	case flag == 1 && !compressor:
		return status.Error(codes.Internal, "grpc: compressed flag set with identity or empty encoding")
	}
	return nil
}

// Decompress replaces a message by what was compressed, of limit bytes at most. After an error the
// frame is empty.
func (f *Message) Decompress(c encoding.Compressor, limit int) error {
	compressed := f.Data
	f.Data = nil
	defer compressed.Free()
	in := compressed.Reader()
	defer in.Close() //nolint:errcheck // never fails
	r, err := c.Decompress(in)
	if err != nil {
		return status.Errorf(codes.Internal, "grpc: failed to decompress the message: %v", err)
	}
	if closer, ok := r.(io.Closer); ok {
		defer closer.Close()
	}
	out, err := mem.ReadAll(io.LimitReader(r, int64(limit)+1), Buffers)
	switch {
	case err != nil:
		err = status.Errorf(codes.Internal, "grpc: failed to read decompressed data: %v", err)
	case out.Len() > limit:
		err = status.Errorf(codes.ResourceExhausted, "grpc: received message after decompression larger than max %d", limit)
	}
	if err != nil {
		out.Free()
		return err
	}
	f.Data = out
	return nil
}

// Compress compresses a message. After an error the frame is empty.
func (f *Message) Compress(c encoding.Compressor) error {
	plain := f.Data
	f.Data = nil
	defer plain.Free()
	var out mem.BufferSlice
	w, err := c.Compress(mem.NewWriter(&out, Buffers))
	if err == nil {
		for _, b := range plain {
			if _, err = w.Write(b.ReadOnlyData()); err != nil {
				break
			}
		}
		if cerr := w.Close(); err == nil {
			err = cerr
		}
	}
	if err != nil {
		out.Free()
		return status.Errorf(codes.Internal, "grpc: error while compressing: %v", err)
	}
	f.Data = out
	return nil
}
