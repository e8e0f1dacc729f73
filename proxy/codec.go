package proxy

import (
	"encoding/binary"
	"fmt"

	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// frame is one gRPC message as its bytes. It owns a reference to its buffers until it is sent or freed.
type frame struct {
	data mem.BufferSlice
}

// free gives the buffers back. A frame may be freed twice.
func (f *frame) free() {
	f.data.Free()
	f.data = nil
}

// edit replaces the message by what fn makes of it. fn gets the message in one piece, must not retain it, and returns the very
// slice it got to leave it as it is.
func (f *frame) edit(fn func([]byte) ([]byte, error)) error {
	var msg []byte
	if len(f.data) == 1 {
		msg = f.data[0].ReadOnlyData()
	} else if len(f.data) > 1 {
		whole := f.data.MaterializeToBuffer(buffers)
		f.data.Free()
		f.data = mem.BufferSlice{whole}
		msg = whole.ReadOnlyData()
	}
	out, err := fn(msg)
	if err != nil {
		return err
	}
	if len(out) == len(msg) && (len(out) == 0 || &out[0] == &msg[0]) {
		return nil
	}
	f.data.Free()
	f.data = mem.BufferSlice{mem.SliceBuffer(out)}
	return nil
}

// replace is edit with an fn that may overwrite the message and return the front of it, or new bytes. After an error the frame is empty.
func (f *frame) replace(fn func([]byte) ([]byte, error)) error {
	// The buffers that grpc hands out are not ours to write to.
	own := buffers.Get(f.data.Len())
	f.data.CopyTo(*own)
	f.free()
	out, err := replaced(own, len(*own), fn)
	if err == nil {
		f.data = mem.BufferSlice{out}
	}
	return err
}

// replaced returns what fn makes of the first n bytes of own, which it takes over.
func replaced(own *[]byte, n int, fn func([]byte) ([]byte, error)) (mem.Buffer, error) {
	out, err := fn((*own)[:n:n])
	if err != nil {
		buffers.Put(own)
		return nil, err
	}
	return bufferOf(own, out), nil
}

// bufferOf returns a buffer of out, which is the front of own or bytes of its own. It takes own over.
func bufferOf(own *[]byte, out []byte) mem.Buffer {
	if len(out) > 0 && &out[0] != &(*own)[0] {
		buffers.Put(own)
		return mem.SliceBuffer(out)
	}
	// The whole goes back to the pool, to be cleared, when its front has been sent.
	whole := mem.NewBuffer(own, buffers)
	defer whole.Free()
	return whole.Slice(0, len(out))
}

// partSize is about how many bytes of a long message are replaced at a time: few enough to stay in the processor's cache until they are done with.
const partSize = 64 << 10

// replaceParts is replace for an fn that takes a message in parts, each of whole fields: protobuf's messages can be cut between two fields and put
// together again.
func (f *frame) replaceParts(fn func([]byte) ([]byte, error)) error {
	if f.data.Len() <= 2*partSize {
		return f.replace(fn)
	}
	in := f.data.Reader()
	defer in.Close() //nolint:errcheck // never fails
	f.free()         // the reader has references of its own, and drops each when it is read
	var out mem.BufferSlice
	var begun []byte // the front of a field whose rest is still to be read
	for size := partSize; len(begun) > 0 || in.Remaining() > 0; {
		size = max(size, len(begun))
		own := buffers.Get(min(size, len(begun)+in.Remaining()))
		n := copy(*own, begun)
		_, _ = in.Read((*own)[n:]) // never fails: so much is there
		whole, next := etcdwire.WholeFields(*own)
		if in.Remaining() == 0 || next < 0 {
			whole = len(*own) // what is wrong with it is for fn to say
		}
		if begun = append(begun[:0], (*own)[whole:]...); whole == 0 {
			buffers.Put(own)
			size = max(2*size, next) // a field that is longer than the part
			continue
		}
		size = partSize
		part, err := replaced(own, whole, fn)
		if err != nil {
			out.Free()
			return err
		}
		out = append(out, part)
	}
	f.data = out
	return nil
}

// rawCodec moves frames without looking inside. Its name is protobuf's, because that is what the bytes are.
type rawCodec struct{}

var _ encoding.CodecV2 = rawCodec{}

// Marshal implements encoding.CodecV2. It hands the frame's buffers over and leaves the frame empty.
func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	f, ok := v.(*frame)
	if !ok {
		return nil, fmt.Errorf("marshal %T: not a frame", v)
	}
	data := f.data
	f.data = nil
	return data, nil
}

// Unmarshal implements encoding.CodecV2. The frame keeps its own reference to the buffers.
func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	f, ok := v.(*frame)
	if !ok {
		return fmt.Errorf("unmarshal into %T: not a frame", v)
	}
	f.data.Free()
	data.Ref()
	f.data = data
	return nil
}

// Name implements encoding.CodecV2.
func (rawCodec) Name() string { return "proto" }

// headLength is that of the head of a gRPC message: a flag and four bytes of length.
const headLength = 5

// head is that of a message of n bytes.
func head(n int) []byte {
	return binary.BigEndian.AppendUint32([]byte{0}, uint32(n)) //nolint:gosec // messages are shorter than 4 GiB
}

// encodeFrame makes a frame of a message: of protobuf's, or a frame already, which it takes over.
func encodeFrame(m any) (*frame, error) {
	switch m := m.(type) {
	case *frame:
		f := &frame{data: m.data}
		m.data = nil
		return f, nil
	case proto.Message:
		msg, err := encode(m)
		if err != nil {
			return nil, err
		}
		return frameOf(msg), nil
	}
	return nil, fmt.Errorf("encode %T: not a message", m)
}

// decode decodes the message into a protobuf's, or hands it over to a frame.
func (f *frame) decode(into any) error {
	switch into := into.(type) {
	case *frame:
		into.data, f.data = f.data, nil
		return nil
	case proto.Message:
		return decode(f.data.Materialize(), into)
	}
	return fmt.Errorf("decode into %T: not a message", into)
}

// frameOf is a frame with these bytes.
func frameOf(msg []byte) *frame { return &frame{data: mem.BufferSlice{mem.SliceBuffer(msg)}} }

func decode(msg []byte, into proto.Message) error {
	if err := proto.Unmarshal(msg, into); err != nil {
		return fmt.Errorf("%w: it cannot be decoded", etcdwire.ErrMalformed)
	}
	return nil
}

func encode(m proto.Message) ([]byte, error) {
	out, err := proto.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode %T: %w", m, err)
	}
	return out, nil
}
