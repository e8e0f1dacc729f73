package rpc

import (
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// Message is one gRPC message as its bytes. It owns a reference to its buffers until it is sent or
// freed.
type Message struct {
	Data mem.BufferSlice
}

// Free gives the buffers back. A frame may be freed twice.
func (f *Message) Free() {
	f.Data.Free()
	f.Data = nil
}

// Edit replaces the message by what fn makes of it. fn gets the message in one piece, must not
// retain it, and returns the very slice it got to leave it as it is.
func (f *Message) Edit(fn func([]byte) ([]byte, error)) error {
	var msg []byte
	if len(f.Data) == 1 {
		msg = f.Data[0].ReadOnlyData()
	} else if len(f.Data) > 1 {
		whole := f.Data.MaterializeToBuffer(Buffers)
		f.Data.Free()
		f.Data = mem.BufferSlice{whole}
		msg = whole.ReadOnlyData()
	}
	out, err := fn(msg)
	if err != nil {
		return err
	}
	if len(out) == len(msg) && (len(out) == 0 || &out[0] == &msg[0]) {
		return nil
	}
	f.Data.Free()
	f.Data = mem.BufferSlice{mem.SliceBuffer(out)}
	return nil
}

// Replace replaces the message by what rewrite makes of it, see [Parts]. After an error the frame
// is empty.
func (f *Message) Replace(whole bool, rewrite Rewrite) error {
	var p Parts
	p.Begin(f.Data.Len(), whole)
	for len(f.Data) > 0 {
		if _, err := p.Take(f.Data[0].ReadOnlyData(), rewrite); err != nil {
			p.Free()
			f.Free()
			return err
		}
		f.Data[0].Free()
		f.Data = f.Data[1:]
	}
	f.Data = p.Result()
	return nil
}

// Codec moves frames without looking inside. Its name is protobuf's, because that is what the bytes
// are.
type Codec struct{}

var _ encoding.CodecV2 = Codec{}

// Marshal implements encoding.CodecV2. It hands the frame's buffers over and leaves the frame
// empty.
func (Codec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*Message)
	if !ok {
		return nil, fmt.Errorf("marshal %T: not a frame", v)
	}
	data := f.Data
	f.Data = nil
	return data, nil
}

// Unmarshal implements encoding.CodecV2. The frame keeps its own reference to the buffers.
func (Codec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*Message)
	if !ok {
		return fmt.Errorf("unmarshal into %T: not a frame", v)
	}
	f.Data.Free()
	data.Ref()
	f.Data = data
	return nil
}

// Name implements encoding.CodecV2.
func (Codec) Name() string { return "proto" }

// HeaderLength is that of the head of a gRPC message: a flag and four bytes of length.
const HeaderLength = 5

// Header is that of a message of n bytes. It is inlined, and needs no memory where it does not
// escape.
func Header(n int) []byte {
	return []byte{0, byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)} //nolint:gosec // the bytes of a number
}

// MessageOf makes a frame of a message: of protobuf's, or a frame already, which it takes over.
func MessageOf(m any) (*Message, error) {
	switch m := m.(type) {
	case *Message:
		f := &Message{Data: m.Data}
		m.Data = nil
		return f, nil
	case proto.Message:
		msg, err := Marshal(m)
		if err != nil {
			return nil, err
		}
		return NewMessage(msg), nil
	}
	return nil, fmt.Errorf("encode %T: not a message", m)
}

// Decode decodes the message into a protobuf's, or hands it over to a frame.
func (f *Message) Decode(into any) error {
	switch into := into.(type) {
	case *Message:
		into.Data, f.Data = f.Data, nil
		return nil
	case proto.Message:
		return Unmarshal(f.Data.Materialize(), into)
	}
	return fmt.Errorf("decode into %T: not a message", into)
}

// NewMessage returns a message of these bytes.
func NewMessage(msg []byte) *Message { return &Message{Data: mem.BufferSlice{mem.SliceBuffer(msg)}} }

// Unmarshal decodes a message. The error wraps [etcdwire.ErrMalformed].
func Unmarshal(msg []byte, into proto.Message) error {
	if err := proto.Unmarshal(msg, into); err != nil {
		return fmt.Errorf("%w: it cannot be decoded", etcdwire.ErrMalformed)
	}
	return nil
}

// Marshal encodes a message.
func Marshal(m proto.Message) ([]byte, error) {
	out, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", m, err)
	}
	return out, nil
}
